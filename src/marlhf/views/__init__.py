"""What people see: the terminal, HTML pages, charts, reports."""
