"""The app, as functions, through its client, and in a browser."""
