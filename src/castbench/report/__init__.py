"""Tables, figures and the report: pure functions of run records."""
