"""Further networks beside the user's."""
