"""`report.html`: one page that holds all it needs."""
