"""Models behind one gateway: each started when it is asked, watched, and let go again."""
