"""Where a run's arrays lie: devices, processes, and the data that is fed to them."""
