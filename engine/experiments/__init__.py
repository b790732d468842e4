"""The paper's experiments: systems as rows of data, a driver that trains them, tables and figures beside its numbers."""
