"""Any FX graph: nodes, copies, extracts, JSON. Knows no parts and no targets."""
