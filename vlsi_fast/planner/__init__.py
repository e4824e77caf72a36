"""Memory, operations, communication and time of a run, predicted from the models' config.json alone.

Reading order: shapes.py (what a model is), memory.py (formulas, with their derivation), walk.py (the stages' memory
curves), build.py (from a config to a stage), speed.py (time on paper), report.py (the `plan` command), checks/ (the
`check` command).
"""
