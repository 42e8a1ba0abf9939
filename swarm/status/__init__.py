"""What people see of a swarm: the picture that a node's journal draws, and its faces in the terminal."""
