"""Whole studies: a plan, the jobs that it makes, the search for hyper-parameters, and who works on them."""
