"""Generated documentation: reference pages and tables from the code, and pictures from measured numbers."""
