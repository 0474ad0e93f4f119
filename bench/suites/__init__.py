"""What is measured: one module a suite. Each function takes a `step.Run` and records its results there."""
