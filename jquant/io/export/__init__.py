"""Writing models as files that other tools load; one file a format."""
