"""Two revisions, or two result files, against each other: what became slower, by how much, and whether it is noise."""
