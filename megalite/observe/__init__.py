"""What a run tells about itself: metrics and the sinks that receive them, throughput, pictures."""
