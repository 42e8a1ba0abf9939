"""`swarm agent`: one node of a machine, for many models and all programs of its user. `agent` joins the parts."""
