"""report.json and report.html: every decision, explained."""
