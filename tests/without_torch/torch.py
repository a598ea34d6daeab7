"""First on the path of the programs that the tests start: training must not need PyTorch."""

raise ImportError("this process is to run as if PyTorch were not installed")
