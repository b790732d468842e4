"""What others would run: the published recipe and the best stock one, as plain padded torch."""
