"""What blocks read: calibration windows on their way through a decoder, and what is remembered of them."""
