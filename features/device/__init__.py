"""What a run computes on: what CUDA asks for beside what a processor does, and how much fits."""
