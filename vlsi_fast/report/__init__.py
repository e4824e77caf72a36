"""`vlsi-fast report`: one self-contained HTML page of what a run did.

Reading order: headline.py (the run in one sentence), collect.py (numbers out of a run's records), charts.py (curves and
flows as SVG), samples.py (what layers say), page.py and page.html.j2 (the page), command.py.
"""
