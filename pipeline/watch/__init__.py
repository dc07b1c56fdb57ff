"""Who sees to it that a job whose ranks die, stop or stand still ends: `rank` in each rank, `watchdog` beside them."""
