"""Draw what evaluations measured and what searches found: one page, figures, tables."""
