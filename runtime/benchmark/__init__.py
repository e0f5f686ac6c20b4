"""Load tests: requests are made, sent at their times, watched token by token, and summed up."""
