"""What a model takes of a GPU, what it costs, and what scale to zero saves: calculated before anything is deployed."""
