"""What people read: the console, tables, units, curves and report pages. Imports no torch."""
