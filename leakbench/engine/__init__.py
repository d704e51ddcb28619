"""Running trials: the driver, its schedule, its executors and the worker that does a task."""
