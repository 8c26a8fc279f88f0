"""What FRoD is worth, and how to get it: tasks × methods × seeds, and the tables and plots that are made of them."""
