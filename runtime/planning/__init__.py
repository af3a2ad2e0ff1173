"""What a start will take, before it: measured rates, and the law that makes times of them."""
