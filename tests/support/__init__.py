"""What tests share: tiny models made on the spot, and real vLLM servers around them."""
