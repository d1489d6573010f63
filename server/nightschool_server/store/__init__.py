"""What outlives a process: the database and its migrations, blobs, and the request log."""
