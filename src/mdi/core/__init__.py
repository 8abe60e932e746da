"""What every room names: errors, sampling, messages, batches, outputs, dtypes, tracing. Imports no other room."""
