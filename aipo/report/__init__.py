"""A run, or an evaluation, as one HTML file that needs nothing else: no network, no server, no other file.

    python -m aipo.report runs/NAME [runs/OTHER ...]
    python -m aipo.report evaluations/NAME [evaluations/OTHER]

load.py (what folders hold) -> advice.py, verdict.py, selected.py, groups.py, scores.py (what it says) -> page.py (the
page). The scripts of the page are plain files beside this one, put in as they are.
"""
