"""The element-wise attention of a query to its prototype."""
