"""What a run showed: summary.json and report.html."""
