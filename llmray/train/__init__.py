"""The training core: one engine, one loop, stages and losses as rows of tables. Knows no Ray."""
