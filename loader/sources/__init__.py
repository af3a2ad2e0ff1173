"""Where weights come from: local files; later S3, HTTP and warm peers."""
