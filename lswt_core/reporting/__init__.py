"""What people read: console, tables, HTML, run reports."""
