"""The train step compiled ahead of time: does it fit, what does it exchange, what will it cost."""
