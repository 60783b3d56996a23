"""What clients get: results made into answers, judged and signed."""
