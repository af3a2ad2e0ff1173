"""Files of requests, answered in one go: read, asked, and written so as to be taken up again."""
