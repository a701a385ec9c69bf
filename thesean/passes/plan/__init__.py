"""Which parts become what: partition, sites, the plan that people read, the hybrid that it makes."""
