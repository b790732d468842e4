"""The two-stream model: configuration, flat parameters, trunk, heads, import and export of the published layout."""
