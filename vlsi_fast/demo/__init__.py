"""The demo: a student that is half of its teacher learns to describe drawings, from few labels, in minutes on a laptop.

Reading order: pictures.py (the task), models.py (the teacher), arms.py (what is compared), inputs.py (data, student,
answers), run.py (the course), training.py (a launch), progress.py, tables.py (what is told), example.py.
"""
