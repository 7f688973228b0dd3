"""Reading the results of finished runs, and showing them in tables, plots and pages."""
