"""PostgreSQL: engine, units of work, named SQL. The only importer of models.tables."""
