"""One self-contained HTML file that shows a run or an experiment: tables, curves, and pictures of what the model says."""
