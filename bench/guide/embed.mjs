// The steps of the guide's Edge Function: batches of jobs come in by HTTP; each job is one request, UPDATE and delete.
import { createServer } from 'node:http'
import { json } from 'node:stream/consumers'
import OpenAI from 'openai'
import postgres from 'postgres'
import { z } from 'zod'

const openai = new OpenAI() // OPENAI_API_KEY and OPENAI_BASE_URL are the environment's
const sql = postgres(process.env.DATABASE_URL)

const jobs = z.array(
  z.object({
    jobId: z.number(),
    id: z.number(),
    schema: z.string(),
    table: z.string(),
    contentFunction: z.string(),
    embeddingColumn: z.string(),
  }),
)

async function embed({ jobId, id, schema, table, contentFunction, embeddingColumn }) {
  const rows = sql`${sql(schema)}.${sql(table)}`
  const [row] = await sql`SELECT ${sql(contentFunction)}(t) AS content FROM ${rows} AS t WHERE id = ${id}`
  if (typeof row?.content !== 'string') throw new Error(`no text: ${schema}.${table}/${id}`)
  const reply = await openai.embeddings.create({ model: 'text-embedding-3-small', input: row.content })
  const embedding = JSON.stringify(reply.data[0].embedding)
  await sql`UPDATE ${rows} SET ${sql(embeddingColumn)} = ${embedding} WHERE id = ${id}`
  await sql`SELECT pgmq.delete('embedding_jobs', ${jobId}::bigint)`
}

async function answer(request, response) {
  const batch = jobs.safeParse(await json(request))
  if (!batch.success) return response.writeHead(400).end(batch.error.message)
  const completedJobs = []
  const failedJobs = []
  // One after the other, as the guide has it: the batches are what runs side by side.
  for (const job of batch.data) {
    try {
      await embed(job)
      completedJobs.push(job)
    } catch (error) {
      failedJobs.push({ ...job, error: String(error) })
      console.error(String(error))
    }
  }
  response.setHeader('content-type', 'application/json').end(JSON.stringify({ completedJobs, failedJobs }))
}

createServer(answer).listen(Number(process.env.PORT), '127.0.0.1', () => console.log('ready'))
