"""OpenAI's API as shapes: bodies to generations, pieces to answers and events; no sockets."""
