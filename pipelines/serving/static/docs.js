// Swagger UI on this server's own OpenAPI document. No validator of another server is asked.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
