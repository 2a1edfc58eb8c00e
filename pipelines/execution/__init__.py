"""What all stages share on Ray: reading tables, pools of actors, progress, and going on after a loss."""
