"""Lines and planes through input space, and what a probe measures over them."""
