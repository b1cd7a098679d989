"""What is found out about this machine: facts that keep bits equal, and hints that choose speed."""
